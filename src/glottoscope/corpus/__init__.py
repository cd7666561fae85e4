"""TODO(lead)"""
