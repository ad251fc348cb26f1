_base_ = ["cross_entropy.py", "_base_/noisy.py"]
