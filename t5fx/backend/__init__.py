"""The backend "t5" of torch.compile, and the new parameters that it keeps beside a model."""
