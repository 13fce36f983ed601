"""``python -m gradclip``."""

import sys

from gradclip.cli import main

sys.exit(main())
