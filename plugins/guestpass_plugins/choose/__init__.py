"""Backend choosers: which gateway serves this session?"""
