"""Fail when `symilar` (read from standard input) found lines that stand twice."""

import sys

report = sys.stdin.read()
if "similar lines in" in report:
    sys.exit(report + "\nThe same lines stand in more than one place: let one piece of code serve.")
