"""Measurements that show what the memory is worth. Measuring never changes what is measured."""
