_base_ = ["imbalanced_noised_topk.py", "_base_/long_tail.py"]
