__version__ = "0.2.0"

import os as _os

# Torch reads it when it is loaded. Its threads otherwise spin while they wait for each other, and beside other work a
# training step takes ten times as long.
_os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# With it a matrix product on a GPU gives the same bits each time, which training asks for.
_os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
