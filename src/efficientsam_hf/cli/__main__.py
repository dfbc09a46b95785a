# SPDX-License-Identifier: Apache-2.0
"""`python -m efficientsam_hf.cli`."""

import sys

from . import main


sys.exit(main())
