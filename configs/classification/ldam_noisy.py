_base_ = ["ldam.py", "_base_/noisy.py"]
