# Detection: mmdet's scope and visualizer, runs counted in epochs.
_base_ = "default_runtime.py"
default_scope = "mmdet"
visualizer = dict(type="DetLocalVisualizer")
log_processor = dict(by_epoch=True)
