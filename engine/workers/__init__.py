"""Worker processes: base, ControlNet and loader. Only the modules that compute on a model import torch."""
