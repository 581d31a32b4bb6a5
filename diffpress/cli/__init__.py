"""The command line: one file per verb, argparse and a call."""
