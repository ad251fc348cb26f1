_base_ = ["focal.py", "_base_/noisy.py"]
