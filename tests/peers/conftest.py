"""The scripts here need packages that the tests do not."""

collect_ignore = ["make_reference.py"]
