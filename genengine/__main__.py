"""`python -m genengine`."""

import sys

from genengine.cli import main

sys.exit(main())
