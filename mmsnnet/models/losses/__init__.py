from mmsnnet.models.losses.si_log_loss import SILogLoss

__all__ = ["SILogLoss"]
