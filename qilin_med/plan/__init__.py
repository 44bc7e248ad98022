"""Will a stage fit, and how long will it take?"""
