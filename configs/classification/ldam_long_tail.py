_base_ = ["ldam.py", "_base_/long_tail.py"]
