"""The whole truth about a GPU in one command: sections in order of value, each in a process of its own.

What is measured is in ``sections``, one file each; nothing of this is imported by the rest of the library.
"""
