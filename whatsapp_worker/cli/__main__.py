"""`python -m whatsapp_worker.cli`: the command without its script."""

import sys

from whatsapp_worker.cli import main

sys.exit(main())
