"""Options: declared once, read from YAML files and the command line, checked with a sentence for each mistake.

``option`` says what one may be, ``values`` which numbers and words there are, ``parsing`` puts defaults, files and the
command line over each other. Which options a script has is in the script.
"""
