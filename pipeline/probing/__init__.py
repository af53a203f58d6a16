"""Linear probes on frozen features of teachers, students and log-mel bands."""
