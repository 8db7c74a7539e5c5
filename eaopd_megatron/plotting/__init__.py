"""Axes and curves that reports and evaluations share."""
