"""Bundled RequestFilters. All of them only `compile`, so the requests stay in the fast lane."""
