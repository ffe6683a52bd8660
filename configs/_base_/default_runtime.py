default_scope = "mmseg"
custom_imports = dict(imports=["mmsnnet.safe_loading"])
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
# Of several processes: each iteration trains, and averages gradients of, the part of the model that its stitch uses.
model_wrapper_cfg = dict(type="mmsnnet.StitchedDataParallel")
randomness = dict(seed=0)
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(by_epoch=False, mean_pattern=r".*(loss|time|data_time|grad_norm|flops_share).*")
log_level = "INFO"
load_from = None
resume = False
