"""One thread for each process of the suite: its models are too small for two, and idle threads slow down other work."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
