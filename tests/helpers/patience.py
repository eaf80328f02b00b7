"""How long tests wait for processes: limits that a loaded machine, four times slower than ours, keeps as well.

No test asserts that something is fast. A limit is only there so that what is lost fails at last.
"""

from __future__ import annotations

PATIENCE_S = 900.0  # for one process, or for one thing that it is to do; pytest's own limit, in setup.cfg, is twice as long
