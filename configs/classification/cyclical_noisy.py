_base_ = ["cyclical.py", "_base_/noisy.py"]
