_base_ = [
    "../_base_/models/stitched-convnext-t-s_retinanet.py",
    "../_base_/datasets/coco_detection_ms-crop.py",
    "../_base_/schedules/schedule_coco_3x_adamw.py",
    "../_base_/default_runtime_det.py",
]
# Block by block to the toolbox's rates of the stems, which are 0.70 of the head's (tiny) and 0.51 (small).
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.98))
