"""A server whose stitch follows the load: the policy, the scheduler of a replica, and the HTTP service on Ray Serve."""
