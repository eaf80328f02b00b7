"""The `lmcode` command: `command` parses the command line, the other modules hold the subcommands."""

from lmcode.cli.command import main as main
