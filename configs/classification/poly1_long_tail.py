_base_ = ["poly1.py", "_base_/long_tail.py"]
