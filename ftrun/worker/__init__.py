"""The work of a run, in its own processes: everything here may import torch, nothing outside imports it but a plugin's methods.

``python -m ftrun.worker outputs/.../run.yaml`` does by hand what the driver does.
"""
