"""Other people's software on our networks: `make test-clients`, or skipped, with the reason, where it is missing."""
