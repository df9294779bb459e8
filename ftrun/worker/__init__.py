"""The work of a run, in its own processes: all that may import torch, and is imported by plugins' methods only.

``python -m ftrun.worker outputs/.../run.yaml`` does by hand what the driver does.
"""
