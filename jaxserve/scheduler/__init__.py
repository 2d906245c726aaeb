"""What runs in the next step: requests, the plan, the scheduler."""
