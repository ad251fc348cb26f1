_base_ = ["cyclical.py", "_base_/long_tail.py"]
