"""A Streamlit application: everything on its page arrives by WebSocket."""

import streamlit as st

st.title("Squares")
clicks = st.session_state.setdefault("clicks", 0)
if st.button("Count"):
    clicks += 1
    st.session_state["clicks"] = clicks
st.write(f"{clicks} clicks, their square is {clicks * clicks}")
st.line_chart([x * x for x in range(clicks + 5)])
