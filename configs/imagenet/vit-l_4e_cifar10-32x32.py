# The large anchor alone.
_base_ = [
    "../_base_/models/classifier_tiny.py",
    "../_base_/datasets/cifar10.py",
    "../_base_/schedules/schedule_tiny_4e.py",
    "../_base_/default_runtime.py",
]
default_scope = "mmengine"
visualizer = dict(type="Visualizer")
log_processor = dict(by_epoch=True)
work_dir = "work_dirs/cifar10/anchor_l"
