_base_ = ["cross_entropy.py", "_base_/long_tail.py"]
