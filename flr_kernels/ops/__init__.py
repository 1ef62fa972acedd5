"""One folder an op: its public function (op.py), its definition (reference.py) and its kernels."""
