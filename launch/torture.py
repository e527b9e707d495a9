"""`python -m launch.torture`: the documented name of `python -m launch.fault_injection`."""

import sys

from launch.fault_injection import main

if __name__ == "__main__":
    sys.exit(main())
