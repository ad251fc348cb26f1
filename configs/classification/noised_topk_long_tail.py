_base_ = ["noised_topk.py", "_base_/long_tail.py"]
