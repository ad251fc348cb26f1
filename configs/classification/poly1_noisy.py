_base_ = ["poly1.py", "_base_/noisy.py"]
