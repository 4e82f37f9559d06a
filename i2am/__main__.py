"""``python -m i2am``: the same as the ``i2am`` command."""

import sys

from i2am.cli import main

sys.exit(main())
