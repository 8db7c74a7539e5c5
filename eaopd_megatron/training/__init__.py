"""Algorithm 1: the loop, the student's update, the schedule, the run's folder."""
