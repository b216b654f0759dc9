"""``python -m cacl`` is ``cacl``."""

import sys

from cacl.cli import main

sys.exit(main())
