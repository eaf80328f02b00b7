"""`python -m lmcode` is the `lmcode` command: the form that launchers (deepspeed --module, mpirun, srun) start."""

from __future__ import annotations

import sys

from lmcode.cli import main

sys.exit(main())
