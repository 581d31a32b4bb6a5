"""`python -m diffpress`, also under `accelerate launch -m diffpress`."""

import sys

from diffpress.cli.main import main

sys.exit(main())
