"""The `lmcode` command: `command` reads the words, the other modules do what they ask for."""

from lmcode.cli.command import main as main
