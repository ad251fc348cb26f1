_base_ = ["noised_topk.py", "_base_/noisy.py"]
