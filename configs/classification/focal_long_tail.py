_base_ = ["focal.py", "_base_/long_tail.py"]
