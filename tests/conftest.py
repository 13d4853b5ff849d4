"One thread for each worker of `pytest -n`: two workers with two threads each get into each other's way on two cores"
import os
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1') # read by torch when it is imported, and by the processes that tests start
